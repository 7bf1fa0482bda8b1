"""Text and tokens.

files             the one reader of text and JSON from outside
tokenizer         `Tokenizer`: text to ids and back, with chat templates
tokenizer_files   a tokenizer's files, checked
chat_template     messages to a prompt; `template_process` renders in a process of its own
training          new tokenizers, and the special ids of a tokenizer
"""
