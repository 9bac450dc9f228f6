"""What an exception says."""


def first_line(error: BaseException) -> str:
    """The first line of its message, as one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ") + "."


def causes(error: BaseException) -> list[BaseException]:
    """The exception, what it was raised from, and so on, as a traceback shows them."""
    chain = [error]
    while cause := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(cause)
    return chain
