# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The MoE layers of any model: where they are, and by which rule their gates choose."""
