"""Everything that a reader of the paper can skip: other models and methods,
long runs, videos, measurements."""
