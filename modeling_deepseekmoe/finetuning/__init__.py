# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a checkpoint on a file of chats or texts with one call: what `deepseekmoe finetune` does."""
