variable "name" {
  description = "Name of the VPC."
  type        = string
}

variable "cluster" {
  description = "Name of the EKS cluster whose nodes live here."
  type        = string
}

variable "cidr" {
  description = "Network of the VPC."
  type        = string
}

variable "zones" {
  description = "Number of availability zones."
  type        = number
  default     = 3
}
