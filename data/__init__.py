"""Data: sources, formats, chat template and mask, packing, order, collate.

`prepare` turns the recipe's data section into tokenised rows; `Order` says which rows each step sees;
`make_loader` delivers them as batches. See docs/data.md.
"""
