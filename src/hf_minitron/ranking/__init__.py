"""Search: candidate architectures pruned, distilled briefly and compared. Stands above the stages and uses them."""
