"""arena -> files: a torch-free process per rank that writes, checksums and fsyncs its rank's share of each save.

client.py     what the trainer holds: starts the process, hands it plans and requests, waits for receipts
process.py    the process itself
attempt.py    one request from start to receipt, given a directory
files.py      the durable writing of a rank's share of each file
blocks.py     extents -> the blocks that are written at once; pure
directory.py  names, descriptors and fsync inside one directory
messages.py   records <-> JSON, and the receipt file
framing.py    frames and descriptors over a Unix socket, each wait bounded
"""
