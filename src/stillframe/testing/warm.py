"""What a save takes the first time in a process, done once in the server that launched processes are forked from.

Imported for that alone. It starts no thread: none would survive the fork.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import stillframe.checkpointer
import stillframe.load.huggingface
import stillframe.testing.models  # noqa: F401

get_checkpoint_conversion_mapping("")  # compiles a thousand regular expressions, and keeps them
