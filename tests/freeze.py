"""Keeps the garbage collector from what has been imported so far, where this is imported.

That is in the server that processes are forked from. Else each full collection in them would look
at all of torch, and write to memory that they share.
"""

import gc

gc.collect()
gc.freeze()
