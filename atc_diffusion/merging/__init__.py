"""One patched network: which clusters serve a call, what its attentions merge, and what is recorded of it."""
