# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Expert-specialised fine-tuning: select the experts that a task uses, and train only those."""
