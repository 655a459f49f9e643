# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Models that are sharded over ranks: how they are loaded, trained, and saved."""
