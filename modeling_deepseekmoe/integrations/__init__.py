# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Connect this package to transformers and TRL. No other part of the package imports this folder."""
