# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Handle adapters as files: read them, write them in other layouts, merge them into their base."""
