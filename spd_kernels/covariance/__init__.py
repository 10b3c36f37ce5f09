"""Mean and centred sum of squares of gradient rows, streamed."""
