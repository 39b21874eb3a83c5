"""Raw images and text in, WebDataset shards and training batches out. The lowest floor: it imports no other."""
