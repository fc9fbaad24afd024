"""DeepSpeed as this project uses it: processes, ZeRO stages, and the fp32 teacher."""
