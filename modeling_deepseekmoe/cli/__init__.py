# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command line, `deepseekmoe`. Each command has its own file."""
