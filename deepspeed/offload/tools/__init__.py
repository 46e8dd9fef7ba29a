"""Commands about disks: ``ds_io`` measures one, ``ds_nvme_tune`` finds its best settings."""
