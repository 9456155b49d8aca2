"""A word to be found letter by letter, for tests of rounds."""

WORD = "bdacbd"


def begun(text, row):
    right = 0
    while right < len(WORD) and text[right : right + 1] == WORD[right]:
        right += 1
    return right / len(WORD)
