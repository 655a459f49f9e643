# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The package wired into transformers and TRL. Nothing below imports it."""
