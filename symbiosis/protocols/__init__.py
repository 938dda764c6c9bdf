"""What both sides must agree on: messages, codec, transports, identity."""
