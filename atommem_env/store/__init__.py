"""What episodes kept: LanceDB, as a durable store in front of which each episode has its working memory."""
