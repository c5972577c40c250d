"""From files to batches: `sources` finds images, `transforms` crops them, `pipeline` batches them."""
