variable "name" {
  description = "Prefix of the repositories."
  type        = string
}
