# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What a model costs, what fits into memory, and what its gates do with a text."""
