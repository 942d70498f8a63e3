"""Between text and tokens: chat templates in, detokenized events out."""
