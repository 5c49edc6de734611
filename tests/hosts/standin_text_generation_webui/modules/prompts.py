from modules.text_generation import get_encoded_length


def count_tokens(text):
    return str(get_encoded_length(text))
