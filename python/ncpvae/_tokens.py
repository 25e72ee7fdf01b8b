"""The four token ids that every vocabulary begins with: what text data and text models agree on."""

PAD, UNK, BOS, EOS = range(4)
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
