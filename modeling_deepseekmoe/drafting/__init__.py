# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Multi-token prediction in training: new layers for a model, and what Trainer logs of them."""
