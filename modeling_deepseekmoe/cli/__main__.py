# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Run the command line with `python -m modeling_deepseekmoe.cli`."""

from .app import main

main()
