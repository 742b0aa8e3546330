"""Block attention kernels: `api.block_attention` is the entrance, `reference` says what is right."""
