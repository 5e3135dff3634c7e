"""The durable store of memories, in LanceDB; during an episode its entries are in a working memory in RAM."""
