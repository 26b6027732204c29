"""Do the methods help? Paired seeds on Fashion-MNIST and movie reviews, each claim an arm against its twin.

    python -m tools.bench_methods [ROW ...] [--seeds 5] [--work build/methods] [--out docs/evidence/methods.md] [--list]

Both arms of a row share student, samples, order and steps, and the initial weights unless these are the claim. Each
arm's learning rate is the better of the same two on validation, with a seed that is not one of the five; everything
else was fixed in advance. The test samples only score. Every finished (arm, seed) is kept under ``--work``: a bench
that was killed goes on where it stood, and a row is printed as soon as it is known.

A further row is one entry in :mod:`tools.bench_methods.rows`; a further kind of student or data is one start, network
or data set in :mod:`tools.bench_methods.vision`.
"""
