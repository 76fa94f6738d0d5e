"""`minimind-dpo plan`: memory before anything is launched."""
