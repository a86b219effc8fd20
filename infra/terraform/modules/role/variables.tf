variable "name" {
  description = "Name of the role."
  type        = string
}

variable "oidc" {
  description = "The cluster's identity provider."
  type = object({
    arn    = string
    issuer = string
  })
}

variable "namespace" {
  description = "Kubernetes namespace of the service account."
  type        = string
}

variable "service_account" {
  description = "The only service account that may take the role."
  type        = string
}

variable "policy" {
  description = "What the role may do, as a JSON policy."
  type        = string
}
