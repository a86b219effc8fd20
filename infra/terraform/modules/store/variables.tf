variable "bucket" {
  description = "Name of the bucket."
  type        = string
}

variable "root_prefix" {
  description = "Folder of the artefacts, without a slash at its end."
  type        = string
}

variable "lifecycle_days" {
  description = "Days until each kind is removed."
  type = object({
    checkpoints  = number
    dead_letters = number
    noncurrent   = number
    uploads      = number
  })
}
