"""What a reader of the paper can skip: more models and methods, long runs, measurements."""

from extras.versions import check

check()
