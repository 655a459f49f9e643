# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Analyse models: what they cost, what fits into memory, and what their gates do with a text."""
