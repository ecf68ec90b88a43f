"""What the processes of a cluster agree on: messages, identities, layouts, errors. No torch."""
