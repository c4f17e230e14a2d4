"""A product that is rounded before it is added to, for sums of products over lanes, in Triton.

Lanes that reduce an axis exchange their values and each adds up all of them: all end with the same
sum, because a + b and b + a round alike. If the value is a product that nothing was added to yet,
the compiler contracts the first addition: a lane then adds the other's rounded product to its own
exact one, and lanes differ in the last bit. They all write their sum to one place in shared memory
when the result changes its layout: a race, and `compute-sanitizer --tool racecheck` reports it.
"""

import triton
import triton.language as tl


@triton.jit
def rounded_product(a, b):
    """Return a b, rounded to fp32 whatever it is added to: one multiply-add, as a product is one.

    Adding +0 is not nothing (it makes -0 a +0), so that the compiler cannot undo it.
    """
    return tl.fma(a, b, 0.0)
