# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Turn a dense model into a DeepSeekMoE that computes the same."""
