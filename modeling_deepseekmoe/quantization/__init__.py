# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Quantised routed experts: a quantiser of transformers that stores stacks in 8 or 4 bits a weight."""
