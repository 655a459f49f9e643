# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Helpers that several parts of the package need and that do not travel to the Hub: other libraries, files, models."""
