# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Publish models on the Hub: choose the files, check them, write the model card, upload."""
