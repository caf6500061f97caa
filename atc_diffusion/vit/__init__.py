"""Token merging in timm's vision transformers: configuration, hooks and reduction."""
