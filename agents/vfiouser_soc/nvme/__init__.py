"""An NVMe 1.4 controller model: registers, queues, admin and NVM commands, backing stores."""
