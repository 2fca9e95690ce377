"""Kernel caches: what CuPy, Triton, Inductor and the driver compiled, kept in the snapshot for the next worker.

Before the user's module is imported the libraries' variables point into a private folder (``home``); what a snapshot holds
for this platform (``platform``) is put there while the imports go on (``placing``); what a start has added is packed
(``packing``) and goes into the next generation beside what its parent has, of this platform and of others (``merging``).

::

    root     kernels_<id of the platform>; also the consumer of its segments
    names    inductor/..., triton/..., cupy/..., driver/<id of the set>/...     (``kinds``)

Kernel caches are code: they come from a trusted store or a signed manifest alone. They never fail a start.
"""
