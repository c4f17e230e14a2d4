"""Which of this repository's kernels are compiled to judge them without a GPU."""

import centre

from mambench.kernels.inventory import Entry


def call(draw):
    """Call the operation as a user would; `draw` makes tensors that have no memory."""
    centre.centre(draw(4096, 1024), draw(4096, 1024))


ENTRIES = (Entry(name="centre bf16", call=call, architectures=(80, 90)),)
