# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Adapters as files: read, written in other layouts, merged into their base."""
