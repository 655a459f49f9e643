# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Publishing: what goes up, the checks before, the model card, the upload."""
