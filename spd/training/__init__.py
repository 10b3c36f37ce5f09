"""What `spd.distill` trains with: texts, loss, checkpoints, and transformers' Trainer on one process or many."""
