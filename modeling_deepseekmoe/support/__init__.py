# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What several parts of the package need and what does not travel: other libraries, files, models."""
