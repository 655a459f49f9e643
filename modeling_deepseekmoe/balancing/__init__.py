# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Auxiliary-loss-free balancing and routing statistics: gates, counts, updates of the bias, Trainer's callbacks."""
